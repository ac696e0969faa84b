package storage

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

func deleted(s *fleet.Session, purge bool) *fleet.Session {
	s.State, s.Deleting, s.Purge, s.Assignment = fleet.StateDeleting, true, purge, nil
	return s
}

func (f *fixture) head(s *fleet.Session) (checkpoint.Head, error) {
	f.Helper()
	st, err := f.Session(s.Spec.Storage)
	if err != nil {
		f.Fatal(err)
	}
	return st.inner.Head(f.Context())
}

var oneProfile = map[string]conf.Config{"default": profile("main", "root")}

func TestDeletedIsMarked(t *testing.T) {
	a, never, others := session("a", "main", "root"), session("never", "main", "root"), session("others", "main", "root")
	running(t, oneProfile, func(f *fixture) {
		f.save(a, map[string]string{"x": "1"})
		f.save(others, map[string]string{"x": "1"})
	}, func(f *fixture) {
		others.UID = "of-a-later-session"
		f.put(deleted(a, false), deleted(never, false), deleted(others, false))
		wait(time.Second)
		for _, id := range []string{"a", "never", "others"} {
			if s := f.get(id); !s.StorageSettled || s.Reason != "" {
				f.Errorf("%s: %+v", id, s)
			}
		}
		if h, err := f.head(a); err != nil || h.DeleteTime.IsZero() || !h.Released || h.Manifest == "" {
			f.Errorf("head of a deleted session: %+v, %v", h, err)
		}
		if h, err := f.head(others); err != nil || !h.DeleteTime.IsZero() {
			f.Errorf("head of somebody else: %+v, %v", h, err)
		}
	})
}

func TestUnreachableIsNotWaitedForForEver(t *testing.T) {
	a := session("a", "main", "root")
	running(t, oneProfile, func(f *fixture) { f.save(a, map[string]string{"x": "1"}) }, func(f *fixture) {
		f.buckets.refuse(func(string) error { return fmt.Errorf("%w: refused", objstore.ErrUnavailable) })
		f.put(deleted(a, false))
		wait(2 * settleFirst)
		if s := f.get("a"); s.StorageSettled || s.Reason != ReasonUnreachable || s.Message == "" {
			f.Errorf("first: %+v", s)
		}
		wait(time.Minute)
		if s := f.get("a"); !s.StorageSettled {
			f.Errorf("after a minute: %+v", s)
		}
	})
}

func TestPurge(t *testing.T) {
	a, b := session("a", "main", "root"), session("b", "main", "root")
	var made *buckets
	running(t, oneProfile, func(f *fixture) {
		f.save(a, map[string]string{"x": "only in a"})
		f.save(b, map[string]string{"x": "in b"})
		made = f.buckets
	}, func(f *fixture) {
		mem := f.buckets.get("main")
		for _, key := range []string{"root/a/workspace/f", "root/a/", "root/ab/f", "a/f"} {
			if _, err := mem.Put(f.Context(), key, []byte("x"), objstore.PutOptions{}); err != nil {
				f.Fatal(err)
			}
		}
		packs := len(f.objects("main", "root/.cloudcode/v1/packs/"))
		f.buckets.refuse(func(op string) error {
			if op == objstore.OpDelete {
				return fmt.Errorf("%w: not these keys", objstore.ErrDenied)
			}
			return nil
		})
		f.put(deleted(a, true))
		wait(10 * time.Minute)
		if s := f.get("a"); s.StorageSettled || s.Reason != ReasonDenied {
			f.Errorf("keys that must not delete: %+v", s)
		}
		f.buckets.refuse(nil)
		wait(settleMax)
		if s := f.get("a"); !s.StorageSettled {
			f.Errorf("not purged: %+v", s)
		}
		if left := append(f.objects("main", "root/a/"), f.objects("main", "root/.cloudcode/v1/sessions/a/")...); len(left) > 0 {
			f.Errorf("left behind: %v", left)
		}
		if len(f.objects("main", "root/ab/f")) != 1 || len(f.objects("main", "a/f")) != 1 {
			f.Errorf("others' objects are gone: %v", f.objects("main", ""))
		}
		if _, err := f.head(b); err != nil {
			f.Errorf("another session: %v", err)
		}

		// Its data goes once it is old enough, and what others need stays.
		if n := len(f.objects("main", "root/.cloudcode/v1/packs/")); n != packs {
			f.Errorf("%d of %d packs are left at once", n, packs)
		}
		wait(checkpoint.DefaultGrace + 2*gcEvery)
		if n := len(f.objects("main", "root/.cloudcode/v1/packs/")); n >= packs || n == 0 {
			f.Errorf("%d of %d packs are left", n, packs)
		}
	})
	f := newFixtureOver(t, t.TempDir(), oneProfile, made)
	st, err := f.Session(b.Spec.Storage)
	if err == nil {
		err = st.inner.Check(t.Context(), "")
	}
	if err != nil {
		t.Errorf("what is left is damaged: %v", err)
	}
}

func TestPurgeOfTheWholeRoot(t *testing.T) {
	a, gone := session("a", "main", ""), session("gone", "main", "")
	a.Spec.Storage.Prefix = ""
	running(t, map[string]conf.Config{"default": profile("main", "")}, func(f *fixture) {
		f.save(a, map[string]string{"x": "1"})
		f.save(gone, map[string]string{"x": "2"})
	}, func(f *fixture) {
		mem := f.buckets.get("main")
		for i := range deleteBatch + 5 {
			if _, err := mem.Put(f.Context(), fmt.Sprintf("workspace/%d", i), []byte("x"), objstore.PutOptions{}); err != nil {
				f.Fatal(err)
			}
		}
		f.put(deleted(a, true))
		wait(time.Second)
		if s := f.get("a"); !s.StorageSettled || len(f.objects("main", "workspace/")) > 0 {
			f.Errorf("%+v, %d objects", s, len(f.objects("main", "workspace/")))
		}
		if _, err := f.head(a); !errors.Is(err, checkpoint.ErrNotFound) {
			f.Errorf("head: %v", err)
		}
		if _, err := f.head(gone); err != nil {
			f.Errorf("another session's checkpoints: %v", err)
		}
	})
}

// What another server has taken over is not this one's to delete; and a purge that
// cannot be done can be taken back.
func TestPurgeOfWhatIsTaken(t *testing.T) {
	a := session("a", "main", "root")
	running(t, oneProfile, func(f *fixture) {
		f.save(a, map[string]string{"x": "1"})
		other := a.Clone()
		other.UID, other.Generation = "elsewhere", 5
		f.save(other, map[string]string{"x": "2"})
	}, func(f *fixture) {
		f.put(deleted(a, true))
		wait(time.Minute)
		s := f.get("a")
		if s.StorageSettled || s.Reason != ReasonTaken {
			f.Errorf("%+v", s)
		}
		if h, err := f.head(a); err != nil || h.Owner.SessionUID != "elsewhere" {
			f.Errorf("head: %+v, %v", h, err)
		}
		s.Purge = false
		f.put(s)
		wait(time.Millisecond)
		if s := f.get("a"); !s.StorageSettled {
			f.Errorf("taken back: %+v", s)
		}
	})
}

// A session that waits when the server starts is settled as well, and one that is
// gone meanwhile is let go.
func TestSettleGivesUpWhatIsGone(t *testing.T) {
	f := newFixture(t, t.TempDir(), oneProfile)
	a := deleted(session("a", "main", "root"), true)
	if done, err := f.settle(t.Context(), "nosuch", "u", 1); !done || err != nil {
		t.Errorf("unknown: %v, %v", done, err)
	}
	f.put(a)
	if done, err := f.settle(t.Context(), "a", "another", 1); !done || err != nil {
		t.Errorf("another of that id: %v, %v", done, err)
	}
	if done, err := f.settle(t.Context(), "a", a.UID, 1); !done || err != nil || !f.get("a").StorageSettled {
		t.Errorf("%v, %v", done, err)
	}
}
