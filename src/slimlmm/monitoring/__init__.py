"""What a store of served answers says: agreement, drift, latency, errors, energy, and alarms that hold their promise."""
