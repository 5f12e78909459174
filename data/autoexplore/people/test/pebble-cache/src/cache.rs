use std::collections::{HashMap, HashSet};

use crate::policy::{clock::Clock, Policy};

/// Pins are for what is dear to make; no more than a tenth of the cache can have one.
#[derive(Default)]
pub struct Cache {
    values: HashMap<String, String>,
    pinned: HashSet<String>,
    clock: Clock<String>,
}

impl Cache {
    pub fn put(&mut self, key: &str, value: &str) {
        if !self.values.contains_key(key) {
            while self.values.len() >= crate::DEFAULT_ENTRIES {
                let old = self.clock.victim().unwrap();
                if self.pinned.contains(&old) {
                    self.clock.insert(old);
                } else {
                    self.values.remove(&old);
                }
            }
            self.clock.insert(key.to_string());
        }
        self.values.insert(key.to_string(), value.to_string());
    }

    pub fn get(&mut self, key: &str) -> Option<&String> {
        self.clock.touched(&key.to_string());
        self.values.get(key)
    }

    pub fn pin(&mut self, key: &str) -> bool {
        self.pinned.len() < crate::DEFAULT_ENTRIES / 10 && self.pinned.insert(key.to_string())
    }
}
