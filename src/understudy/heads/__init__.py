"""What is trained beside the student to learn from a teacher, and never exported."""
