"""Training of the fusion networks: genes from H&E tiles and transcripts, and contrast between both."""
