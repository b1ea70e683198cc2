"""Which sample comes when, and its way to the device."""
