"""What all rooms use and none owns: files, consoles, processes, pictures, padding."""
