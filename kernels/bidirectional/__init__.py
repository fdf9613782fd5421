"""Bidirectional attention, forward and backward."""
