"""What ``python -m fastfusion bench`` times on a CPU."""
