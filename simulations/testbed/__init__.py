"""One server and several devices on one machine, over real links of different rates.

Every device is a network namespace with a real SuperNode in it; the links between them
and the server are shaped by the kernel. ``make testbed`` runs it, as root.
"""
