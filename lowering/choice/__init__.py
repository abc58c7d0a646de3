"""Which kernels may be taken: whose numbers are right on this device, and which of them is fastest."""
