"""What is read of an encoder: heads that turn its tokens into the outputs of a task."""
