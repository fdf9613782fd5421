"""What runs on a CPU and on a GPU share: shapes, calls, peers, the correctness gate, goals."""
