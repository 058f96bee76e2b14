"""Operating a server: its folder, its addresses, its status, its admin requests and its backups."""
