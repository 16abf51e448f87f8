"""What is released: one folder or zip with the student, its card, and the means to run it."""
