"""Where anatomy is: the fixed grid in MNI space, label images, and their parcels on the grid."""
