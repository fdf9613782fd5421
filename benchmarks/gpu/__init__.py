"""What ``make gpu`` checks and times on an NVIDIA GPU, and what is made for it beforehand."""
