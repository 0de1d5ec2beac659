"""Files of projects, and jobs that people start on them by name."""
