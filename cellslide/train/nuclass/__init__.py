"""Training of NuClass, which types nuclei, in three stages."""
