//! Real namespaces; needs root.
