"""Slow, plain forms that say what the compiled and streamed ones must give."""
