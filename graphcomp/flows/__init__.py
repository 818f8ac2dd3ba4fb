"""The stages behind each public function, from kept units to a verified result."""
