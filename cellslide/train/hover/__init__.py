"""Training of networks with HoVer-Net's maps: CellVTA, CellViT, HoVer U-Net."""
