"""The GLUE simulation: tasks, devices' data and the Flower app that trains on them."""
