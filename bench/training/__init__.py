"""What experiments that train have in common: tasks, one loop, and files of results whose cells are run once."""
