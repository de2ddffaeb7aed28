"""DICOM in: the BOLD series of a folder as BIDS-named NIfTI in their own space, with nothing personal in them."""
