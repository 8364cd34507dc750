"""The velocity networks, and the policy made of one."""
