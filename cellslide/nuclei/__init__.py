"""Network output to nuclei: HoVer decoding, non-maximum suppression of points, and the merge of tiles."""
