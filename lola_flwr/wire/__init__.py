"""What travels between server and devices, and how many bits that takes."""
