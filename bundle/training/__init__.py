"""What training needs beside MONAI's and Ignite's engines: losses, metrics, handlers, checkpoints."""
