"""What every op is made of: its call, its implementations, its reference, its face to torch."""
