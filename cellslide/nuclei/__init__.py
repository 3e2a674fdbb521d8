"""HoVer maps of a tile to nuclei: `decode` is the way in, the other files are its steps."""
