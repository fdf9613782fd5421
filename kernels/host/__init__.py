"""What the launchers share on the host: tiles, arguments, plans."""
