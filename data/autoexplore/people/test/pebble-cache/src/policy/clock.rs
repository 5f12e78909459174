use std::collections::VecDeque;

/// An entry gets two more rounds after each use, then it has to go.
pub const CHANCES: u8 = 2;

#[derive(Default)]
pub struct Clock<K> {
    ring: VecDeque<(K, u8)>,
}

impl<K: PartialEq> super::Policy<K> for Clock<K> {
    fn insert(&mut self, key: K) {
        self.ring.push_back((key, 0));
    }

    fn touched(&mut self, key: &K) {
        if let Some(slot) = self.ring.iter_mut().find(|s| &s.0 == key) {
            slot.1 = CHANCES;
        }
    }

    fn victim(&mut self) -> Option<K> {
        while let Some((key, left)) = self.ring.pop_front() {
            if left == 0 {
                return Some(key);
            }
            self.ring.push_back((key, left - 1));
        }
        None
    }
}
