"""A decoder over the devices of a mesh, with A and B beside it; see README.md."""
