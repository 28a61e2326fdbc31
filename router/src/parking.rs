//! How many requests may wait for a sprite to wake. One that is over the limit is refused at once, so that a sprite which never wakes cannot
//! take the whole edge with it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use proto::id::SpriteId;

/// A sprite that is flooded while it sleeps wakes to at most this many requests.
pub(crate) const PARKED_PER_SPRITE_MAX: u32 = 128;
/// Each waiting request holds two sockets and about 20 KiB.
pub(crate) const PARKED_MAX: u32 = 10_000;

#[derive(Debug, Default)]
pub(crate) struct Parking(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    total: u32,
    per_sprite: HashMap<SpriteId, u32>,
}

/// A place of a waiting request; dropping it frees the place.
#[derive(Debug)]
pub(crate) struct Place {
    parking: Arc<Parking>,
    sprite: SpriteId,
}

/// There is no place; nothing was taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Parking {
    pub(crate) fn enter(self: &Arc<Self>, sprite: SpriteId) -> Result<Place, Full> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = places.per_sprite.get(&sprite).copied().unwrap_or_default();
        if here >= PARKED_PER_SPRITE_MAX || places.total >= PARKED_MAX {
            return Err(Full);
        }
        places.per_sprite.insert(sprite, here + 1);
        places.total += 1;
        Ok(Place { parking: Arc::clone(self), sprite })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.parking.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.total -= 1;
        if let Some(here) = places.per_sprite.get_mut(&self.sprite) {
            *here -= 1;
            if *here == 0 {
                places.per_sprite.remove(&self.sprite);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sprite_cannot_take_all_places_and_places_come_back() {
        let parking = Arc::new(Parking::default());
        let (flooded, other) = (SpriteId::generate(), SpriteId::generate());
        let places: Vec<Place> = (0..PARKED_PER_SPRITE_MAX).map(|_| parking.enter(flooded).unwrap()).collect();
        assert_eq!(parking.enter(flooded).unwrap_err(), Full);
        drop(parking.enter(other).unwrap());
        drop(places);
        assert!(parking.0.lock().unwrap().per_sprite.is_empty());
        drop(parking.enter(flooded).unwrap());
    }

    #[test]
    fn the_edge_as_a_whole_has_a_limit() {
        let parking = Arc::new(Parking::default());
        let sprites: Vec<SpriteId> = (0..=PARKED_MAX / PARKED_PER_SPRITE_MAX).map(|_| SpriteId::generate()).collect();
        let places: Vec<Place> =
            (0..PARKED_MAX as usize).map(|n| parking.enter(sprites[n % sprites.len()]).unwrap()).collect();
        assert_eq!(parking.enter(SpriteId::generate()).unwrap_err(), Full);
        drop(places);
        parking.enter(SpriteId::generate()).unwrap();
    }
}
