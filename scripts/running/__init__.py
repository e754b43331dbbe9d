"""How a command runs at all: errors, files, locks, checks, processes and pictures. Imports no other room."""
