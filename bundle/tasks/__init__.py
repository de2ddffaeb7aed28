"""What is predicted: target, loss, subject score, and the columns of predictions."""
