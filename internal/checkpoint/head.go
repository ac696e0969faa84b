package checkpoint

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Owner of a session: who may write its checkpoints.
type Owner struct {
	SessionID, SessionUID string
	Node, Instance        string
	Generation            uint64
}

func (o Owner) String() string {
	return fmt.Sprintf("generation %d of session %s on node %s", o.Generation, o.SessionID, o.Node)
}

// Head says who owns a session, and which checkpoint is its newest.
type Head struct {
	Owner      Owner
	Manifest   string // "" before the first checkpoint
	Restored   string // Meta.Restored of that checkpoint
	DeleteTime time.Time
	Time       time.Time // when it was written
	Released   bool      // its owner is done: a higher generation of any session may take it

	etag    string
	written time.Time // by the store's clock; zero if that is not known
}

// Purged says that the head is all that is left of a session. It stays, so that a
// late owner of that session is fenced, and the next session there has a higher
// generation.
func (h Head) Purged() bool { return h.Released && h.Manifest == "" && !h.DeleteTime.IsZero() }

// copied says that the session was begun with a copy, and no node has it yet.
func (h Head) copied() bool {
	return h.Owner.Node == "" && h.Released && h.Manifest != "" && h.DeleteTime.IsZero()
}

type headJSON struct {
	Version    int        `json:"version"`
	Owner      ownerJSON  `json:"owner"`
	Manifest   string     `json:"manifest,omitempty"`
	Restored   string     `json:"restored,omitempty"`
	DeleteTime *time.Time `json:"delete_time,omitempty"`
	Time       time.Time  `json:"time"`
	Released   bool       `json:"released,omitempty"`
	// Write makes each text of a head one of its kind: who lost the answer to a
	// write can tell whether what is there is its own.
	Write string `json:"write"`
}

const (
	headVersion = 1
	maxHead     = 64 << 10
	// maxGeneration is more than any session reaches. Near the end of the numbers
	// there would be no next owner.
	maxGeneration = 1 << 53
)

func encodeHead(h Head) []byte {
	var nonce [8]byte
	rand.Read(nonce[:])
	j := headJSON{
		Version: headVersion, Owner: ownerJSON(h.Owner), Manifest: h.Manifest, Restored: h.Restored,
		Time: h.Time.UTC(), Released: h.Released, Write: hex.EncodeToString(nonce[:]),
	}
	if !h.DeleteTime.IsZero() {
		t := h.DeleteTime.UTC()
		j.DeleteTime = &t
	}
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		panic(err) // a year beyond 9999
	}
	return append(b, '\n')
}

func decodeHead(text []byte) (Head, error) {
	if len(text) > maxHead {
		return Head{}, fmt.Errorf("%w: %d bytes", ErrDamaged, len(text))
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	var j headJSON
	if err := d.Decode(&j); err != nil {
		return Head{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Head{}, fmt.Errorf("%w: text behind its end", ErrDamaged)
	}
	if j.Version != headVersion {
		return Head{}, fmt.Errorf("%w: version %d is not known here: use a newer cloudcode", ErrDamaged, j.Version)
	}
	if j.Manifest != "" && !manifestID.MatchString(j.Manifest) {
		return Head{}, fmt.Errorf("%w: %q is no checkpoint", ErrDamaged, j.Manifest)
	}
	if j.Owner.Generation > maxGeneration {
		return Head{}, fmt.Errorf("%w: generation %d is no session's", ErrDamaged, j.Owner.Generation)
	}
	h := Head{Owner: Owner(j.Owner), Manifest: j.Manifest, Restored: j.Restored, Time: j.Time, Released: j.Released}
	if j.DeleteTime != nil {
		h.DeleteTime = *j.DeleteTime
	}
	return h, nil
}

// Head of the session. Returns ErrNotFound if nothing ever was here, or somebody
// removed it with other tools: a purge leaves a head.
func (s *Session) Head(ctx context.Context) (Head, error) {
	h, _, err := s.head(ctx)
	return h, err
}

func (s *Session) head(ctx context.Context) (Head, []byte, error) {
	if s.err != nil {
		return Head{}, nil, s.err
	}
	text, o, err := objstore.GetUpTo(ctx, s.r.store, s.headKey(), maxHead)
	if errors.Is(err, objstore.ErrTooLarge) {
		return Head{}, nil, fmt.Errorf("%s: %w: %w", s.headKey(), ErrDamaged, err)
	}
	if errors.Is(err, objstore.ErrNotFound) {
		return Head{}, nil, fmt.Errorf("%w: there are none of %q", ErrNotFound, s.prefix)
	}
	if err != nil {
		return Head{}, nil, fmt.Errorf("read head of %q: %w", s.prefix, err)
	}
	h, err := decodeHead(text)
	if err != nil {
		return Head{}, nil, fmt.Errorf("%s: %w", s.headKey(), err)
	}
	h.etag, h.written = o.ETag, o.LastModified
	return h, text, nil
}

// write replaces the head that was read as from (zero: there is none) by to. If the
// answer is lost it looks: errLost means that somebody else's head is there.
func (s *Session) write(ctx context.Context, from, to Head) (Head, error) {
	to.Time = time.Now()
	text := encodeHead(to)
	opts := objstore.PutOptions{IfMatch: from.etag, IfNoneMatch: from.etag == "", ContentType: "application/json"}
	o, err := s.r.store.Put(ctx, s.headKey(), text, opts)
	if err == nil {
		to.etag = o.ETag
		return to, nil
	}
	if !errors.Is(err, objstore.ErrPrecondition) && !errors.Is(err, objstore.ErrUnavailable) && !errors.Is(err, objstore.ErrNotFound) {
		return Head{}, fmt.Errorf("write head of %q: %w", s.prefix, err)
	}
	there, now, lookErr := s.head(ctx)
	switch {
	case lookErr == nil && bytes.Equal(now, text):
		return there, nil
	case lookErr == nil && there.etag != from.etag:
		return there, errLost
	case errors.Is(lookErr, ErrNotFound) && from.etag != "":
		return Head{}, errLost
	}
	return Head{}, fmt.Errorf("write head of %q: %w", s.prefix, err)
}

var errLost = errors.New("the head is another")

// headTries bounds how often a head is read again because it changed meanwhile.
const headTries = 4

// update reads the head and writes what change makes of it, until nobody comes
// between. change may return an error, which ends it, or false for no change. Gives
// the head that it was made of, and whether there was one.
func (s *Session) update(ctx context.Context, change func(h *Head, exists bool) (bool, error)) (from Head, existed bool, err error) {
	for range headTries {
		from, err := s.Head(ctx)
		if err != nil && !errors.Is(err, ErrNotFound) || s.err != nil {
			return Head{}, false, err
		}
		existed := err == nil
		to := from
		write, err := change(&to, existed)
		if err != nil || !write {
			return from, existed, err
		}
		if _, err = s.write(ctx, from, to); !errors.Is(err, errLost) {
			return from, existed, err
		}
	}
	return Head{}, false, fmt.Errorf("%w: the head of %q changes all the time", objstore.ErrUnavailable, s.prefix)
}

// Acquire makes o the owner: it makes the head or takes it over. Returns ErrFenced
// if a newer generation has it, or another owner of the same one.
//
// A session that is made anew on an old prefix has another uid. It gets a head that
// was released, and with a higher generation only: see Head. Whatever is late of the
// session before has a lower one. What was copied for a session that is not stored yet
// is ErrExists for others: it is theirs, or taken back, within moments.
//
// before is the head that it took over: what the owner before saved until then is in
// it, while a head that was read earlier may lack that. If the session was o's
// already, it is that head. existed is false if there was none.
func (s *Session) Acquire(ctx context.Context, o Owner) (before Head, existed bool, err error) {
	if o.Generation > maxGeneration {
		return Head{}, false, fmt.Errorf("generation %d of %q is no session's", o.Generation, s.prefix)
	}
	return s.update(ctx, func(h *Head, exists bool) (bool, error) {
		if exists {
			if h.Owner == o && !h.Released && h.DeleteTime.IsZero() {
				return false, nil
			}
			if err := mayTake(*h, o); err != nil {
				return false, err
			}
		}
		h.Owner, h.Released, h.DeleteTime = o, false, time.Time{}
		return true, nil
	})
}

func mayTake(h Head, o Owner) error {
	switch {
	case h.Owner == o:
		return nil
	case o.SessionUID != h.Owner.SessionUID && h.copied():
		return fmt.Errorf("%w: a copy was made here for session %s of uid %s, which no node has yet", ErrExists, h.Owner.SessionID, h.Owner.SessionUID)
	case o.SessionUID != h.Owner.SessionUID:
		if h.Released && o.Generation > h.Owner.Generation {
			return nil
		}
	case o.Generation > h.Owner.Generation, o.Generation == h.Owner.Generation && h.Released:
		return nil
	}
	return fmt.Errorf("%w: %s has it since %s, and this is %s", ErrFenced, h.Owner, h.Time.UTC().Format(time.RFC3339), o)
}

// Verify returns ErrFenced if another is the owner, and ErrNotFound if nobody is,
// as the head is not there: then nobody has taken the session over.
func (s *Session) Verify(ctx context.Context, o Owner) error {
	h, err := s.Head(ctx)
	if errors.Is(err, ErrNotFound) {
		return s.missing()
	}
	if err != nil {
		return err
	}
	return s.owns(h, o)
}

// missing is the error of what needs the head that o has acquired, and does not find
// it. Nothing of Cloud Code removes the head of a session that is in use.
func (s *Session) missing() error {
	if s.err != nil {
		return s.err
	}
	return fmt.Errorf("%w: the head of %q, %s, is not there: the bucket was emptied, or another bucket is at its place; the session must be acquired anew", ErrNotFound, s.prefix, s.headKey())
}

func (s *Session) owns(h Head, o Owner) error {
	if h.Owner != o {
		return fmt.Errorf("%w: %q has %s, and this is %s", ErrFenced, s.prefix, h.Owner, o)
	}
	return nil
}

// Release says that o is done with the session, and whether the session itself was
// deleted. The checkpoints stay. Returns ErrFenced, ErrNotFound.
func (s *Session) Release(ctx context.Context, o Owner, deleted bool) error {
	_, _, err := s.update(ctx, func(h *Head, exists bool) (bool, error) {
		if !exists {
			return false, s.missing()
		}
		if err := s.owns(*h, o); err != nil {
			return false, err
		}
		if h.Released && !h.DeleteTime.IsZero() == deleted {
			return false, nil
		}
		h.Released = true
		if deleted && h.DeleteTime.IsZero() {
			h.DeleteTime = time.Now()
		}
		return true, nil
	})
	return err
}

// Retire makes o, which is of no node, the owner for the end of the session, and says
// that it is deleted: whoever has it is fenced. Its checkpoints stay. Only a higher
// generation than all before may do so, and of another session only if that was
// released. Unless released is set, o has it until Purge or Release. Returns
// ErrFenced.
func (s *Session) Retire(ctx context.Context, o Owner, released bool) error {
	_, _, err := s.update(ctx, func(h *Head, exists bool) (bool, error) {
		if exists && h.Owner != o {
			if err := mayTake(*h, o); err != nil {
				return false, err
			}
			if o.Generation == h.Owner.Generation {
				return false, s.owns(*h, o) // it may run elsewhere, and be let go of for now
			}
		}
		if exists && h.Owner == o && h.Released == released && !h.DeleteTime.IsZero() {
			return false, nil
		}
		h.Owner, h.Released = o, released
		if h.DeleteTime.IsZero() {
			h.DeleteTime = time.Now()
		}
		return true, nil
	})
	return err
}

// move makes manifest the newest of what o owns. h is the head as last seen.
func (s *Session) move(ctx context.Context, h Head, o Owner, manifest, restored string) (Head, error) {
	for range headTries {
		to := h
		to.Manifest, to.Restored, to.Released = manifest, restored, false
		now, err := s.write(ctx, h, to)
		if !errors.Is(err, errLost) {
			return now, err
		}
		if now.etag == "" {
			return Head{}, s.missing()
		}
		if err := s.owns(now, o); err != nil {
			return now, err
		}
		h = now // an own write that came late
	}
	return Head{}, fmt.Errorf("%w: the head of %q changes all the time", objstore.ErrUnavailable, s.prefix)
}
