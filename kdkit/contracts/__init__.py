"""The interfaces that plugin authors implement, and the records that they receive."""
