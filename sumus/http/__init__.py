"""What every side that listens shares: connections that nobody can hold for nothing, and bodies read into bounded memory."""
