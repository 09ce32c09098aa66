"""Plain files of others: .pt, .safetensors and HDF5, read as hostile input and written whole or not at all."""
