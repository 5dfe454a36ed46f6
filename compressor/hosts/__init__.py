"""Devices reached over the system's OpenSSH: their addresses, a connection, and what is carried over it."""
