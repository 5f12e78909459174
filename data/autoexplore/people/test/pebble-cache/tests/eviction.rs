use pebble_cache::policy::{lru::Lru, Policy};
use pebble_cache::Cache;

// Pinned entries stay, however many others come after them.
#[test]
fn pinned_stay() {
    let mut cache = Cache::default();
    cache.put("dear", "1");
    assert!(cache.pin("dear"));
    for i in 0..5000 {
        cache.put(&i.to_string(), "x");
    }
    assert!(cache.get("dear").is_some());
    assert!(cache.get("3").is_none());
}

// Bug 31: an entry that was touched came out first.
#[test]
fn touched_goes_last() {
    let mut lru = Lru::default();
    lru.insert(1);
    lru.insert(2);
    lru.touched(&1);
    assert_eq!(lru.victim(), Some(2));
}
