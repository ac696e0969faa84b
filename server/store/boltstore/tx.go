package boltstore

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	requestsKept   = 24 * time.Hour
	requestsSwept  = 8       // old requests dropped with every new one
	eventBytesKept = 8 << 20 // of one session, roughly; a spec can be large and is in every event
)

// tx is a store.Tx, or a store.ReadTx if bolt is read-only.
type tx struct {
	bolt    *bbolt.Tx
	rev     store.Revision
	next    store.Revision // what this transaction will be
	wrote   bool
	changes []sized
}

func newTx(b *bbolt.Tx) *tx {
	return &tx{bolt: b, rev: store.Revision(number(b.Bucket(bucketMeta).Get(keyRevision)))}
}

func (t *tx) Revision() store.Revision { return t.rev }

func (t *tx) Session(id string) (*fleet.Session, error) {
	return get[fleet.Session](t.bolt.Bucket(bucketSessions), "session", id)
}

func (t *tx) Sessions(after string) iter.Seq2[*fleet.Session, error] {
	return scan[fleet.Session](t.bolt.Bucket(bucketSessions), []byte(after))
}

func (t *tx) Node(id string) (*fleet.Node, error) {
	return get[fleet.Node](t.bolt.Bucket(bucketNodes), "node", id)
}

func (t *tx) Nodes(after string) iter.Seq2[*fleet.Node, error] {
	return scan[fleet.Node](t.bolt.Bucket(bucketNodes), []byte(after))
}

func (t *tx) Events(uid string, after uint64) iter.Seq2[*fleet.LifecycleEvent, error] {
	return scan[fleet.LifecycleEvent](t.bolt.Bucket(bucketEvents).Bucket([]byte(uid)), bigEndian(after))
}

func (t *tx) Request(key string) (store.Request, error) {
	r, err := get[store.Request](t.bolt.Bucket(bucketRequests), "request", key)
	if err != nil {
		return store.Request{}, err
	}
	if time.Since(time.Unix(r.UnixSeconds, 0)) > requestsKept {
		return store.Request{}, fmt.Errorf("%w: request %s was made more than a day ago", fleet.ErrNotFound, key)
	}
	return *r, nil
}

func (t *tx) PutSession(s *fleet.Session) error {
	t.wrote = true
	s.Revision = uint64(t.next)
	size, err := put(t.bolt.Bucket(bucketSessions), []byte(s.ID), s)
	if err != nil {
		return fmt.Errorf("store session %s: %w", s.ID, err)
	}
	t.change(size, store.Change{Kind: store.KindSession, ID: s.ID, Session: s.Clone()})
	return nil
}

func (t *tx) DeleteSession(id string) error {
	s, err := t.Session(id)
	if err != nil {
		return err
	}
	t.wrote = true
	if err := t.bolt.Bucket(bucketSessions).Delete([]byte(id)); err != nil {
		return err
	}
	if err := t.bolt.Bucket(bucketEvents).DeleteBucket([]byte(s.UID)); err != nil && !errors.Is(err, bolterrors.ErrBucketNotFound) {
		return err
	}
	t.change(0, store.Change{Kind: store.KindSession, ID: id})
	return nil
}

func (t *tx) PutNode(n *fleet.Node) error {
	t.wrote = true
	n.Revision = uint64(t.next)
	size, err := put(t.bolt.Bucket(bucketNodes), []byte(n.ID), n)
	if err != nil {
		return fmt.Errorf("store node %s: %w", n.ID, err)
	}
	t.change(size, store.Change{Kind: store.KindNode, ID: n.ID, Node: n.Clone()})
	return nil
}

func (t *tx) AppendEvent(s *fleet.Session) (uint64, error) {
	t.wrote = true
	b, err := t.bolt.Bucket(bucketEvents).CreateBucketIfNotExists([]byte(s.UID))
	if err != nil {
		return 0, err
	}
	seq, err := b.NextSequence()
	if err != nil {
		return 0, err
	}
	event := &fleet.LifecycleEvent{Sequence: seq, Time: time.Now().UTC(), Session: s.WithoutSecrets()}
	size, err := put(b, bigEndian(seq), event)
	if err != nil {
		return 0, fmt.Errorf("store event of session %s: %w", s.ID, err)
	}
	kept := uint64(max(1, min(store.EventsKept, eventBytesKept/size)))
	for c := b.Cursor(); ; {
		first, _ := c.First()
		if seq-number(first) < kept {
			break
		}
		if err := c.Delete(); err != nil {
			return 0, err
		}
	}
	t.change(size, store.Change{Kind: store.KindEvent, ID: s.ID, Event: event})
	return seq, nil
}

func (t *tx) PutRequest(key string, r store.Request) error {
	t.wrote = true
	requests, times := t.bolt.Bucket(bucketRequests), t.bolt.Bucket(bucketRequestTimes)
	old := bigEndian(uint64(time.Now().Add(-requestsKept).Unix()))
	for range requestsSwept {
		k, _ := times.Cursor().First()
		if k == nil || string(k[:8]) >= string(old) {
			break
		}
		// The request may have been made again since, with a newer time.
		if kept, err := get[store.Request](requests, "request", string(k[8:])); err == nil && kept.UnixSeconds == int64(number(k[:8])) {
			if err := requests.Delete(k[8:]); err != nil {
				return err
			}
		}
		if err := times.Delete(k); err != nil {
			return err
		}
	}
	if _, err := put(requests, []byte(key), &r); err != nil {
		return err
	}
	return times.Put(append(bigEndian(uint64(r.UnixSeconds)), key...), nil)
}

func (t *tx) change(size int, c store.Change) {
	c.Revision = t.next
	t.changes = append(t.changes, sized{c, size})
}

func get[T any](b *bbolt.Bucket, what, id string) (*T, error) {
	data := b.Get([]byte(id))
	if data == nil {
		return nil, fmt.Errorf("%w: %s %q", fleet.ErrNotFound, what, id)
	}
	return decode[T]([]byte(id), data)
}

func decode[T any](key, data []byte) (*T, error) {
	v := new(T)
	if err := json.Unmarshal(data, v); err != nil {
		return nil, fmt.Errorf("state file: %T %q: %w", v, key, err)
	}
	return v, nil
}

func put(b *bbolt.Bucket, key []byte, v any) (size int, err error) {
	data, err := json.Marshal(v)
	if err != nil {
		return 0, err
	}
	return len(data), b.Put(key, data)
}

// scan yields the values behind a key, in order; also while they are changed.
func scan[T any](b *bbolt.Bucket, after []byte) iter.Seq2[*T, error] {
	return func(yield func(*T, error) bool) {
		if b == nil {
			return
		}
		c := b.Cursor()
		k, data := c.Seek(after)
		if k != nil && string(k) == string(after) {
			k, data = c.Next()
		}
		for k != nil {
			v, err := decode[T](k, data)
			if !b.Writable() {
				if !yield(v, err) {
					return
				}
				k, data = c.Next()
				continue
			}
			// A write while we iterate moves what a cursor stands on.
			behind := append(append([]byte(nil), k...), 0)
			if !yield(v, err) {
				return
			}
			k, data = b.Cursor().Seek(behind)
		}
	}
}

func number(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func bigEndian(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
