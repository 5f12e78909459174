use std::collections::VecDeque;

// Linear search is fine below some 2000 keys and much simpler than a linked list.
#[derive(Default)]
pub struct Lru<K> {
    order: VecDeque<K>,
}

impl<K: PartialEq> super::Policy<K> for Lru<K> {
    fn insert(&mut self, key: K) {
        self.order.push_back(key);
    }

    fn touched(&mut self, key: &K) {
        if let Some(i) = self.order.iter().position(|k| k == key) {
            let key = self.order.remove(i).unwrap();
            self.order.push_back(key);
        }
    }

    fn victim(&mut self) -> Option<K> {
        self.order.pop_front()
    }
}
