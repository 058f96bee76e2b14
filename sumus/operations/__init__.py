"""What opens a server, shows it and keeps it running: its folder, its addresses, its admin, its backups."""
