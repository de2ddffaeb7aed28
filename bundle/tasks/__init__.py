"""What is predicted of a subject: loss, score, metrics and plots of each kind of target."""
