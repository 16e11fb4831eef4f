"""One function per stage; each reads and writes files."""
