package storage

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

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
		if left := append(f.objects("main", "root/a/"), f.objects("main", "root/.cloudcode/v1/sessions/a/manifests/")...); len(left) > 0 {
			f.Errorf("left behind: %v", left)
		}
		if h, err := f.head(a); err != nil || !h.Purged() || h.Owner.Generation != a.Generation+1 {
			f.Errorf("late nodes are not fenced: %+v, %v", h, err)
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
	f := newFixture(t, t.TempDir(), map[string]conf.Config{"default": profile("main", "")})
	f.save(a, map[string]string{"x": "1"})
	f.save(gone, map[string]string{"x": "2"})
	mem := f.buckets.get("main")
	for i := range deleteBatch + 5 {
		if _, err := mem.Put(t.Context(), fmt.Sprintf("workspace/%d", i), []byte("x"), objstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	f.put(deleted(a, true))
	if done, err := f.settle(t.Context(), "a", a.UID, 1); !done || err != nil || !f.get("a").StorageSettled || len(f.objects("main", "workspace/")) > 0 {
		t.Errorf("%v, %v, %d objects", done, err, len(f.objects("main", "workspace/")))
	}
	if h, err := f.head(a); err != nil || !h.Purged() {
		t.Errorf("head: %+v, %v", h, err)
	}
	if h, err := f.head(gone); err != nil || h.Manifest == "" {
		t.Errorf("another session's checkpoints: %+v, %v", h, err)
	}
}

// What another server has taken over is not this one's to delete, also not if it was
// recovered there, with its uid; and a purge that cannot be done can be taken back.
func TestPurgeOfWhatIsTaken(t *testing.T) {
	for name, uid := range map[string]string{"another session": "elsewhere", "recovered": "u-a"} {
		t.Run(name, func(t *testing.T) {
			a := session("a", "main", "root")
			other := a.Clone()
			other.UID, other.Generation = uid, 5
			running(t, oneProfile, func(f *fixture) {
				f.save(a, map[string]string{"x": "1"})
				f.save(other, map[string]string{"x": "2"})
			}, func(f *fixture) {
				before, err := f.head(other)
				if err != nil {
					f.Fatal(err)
				}
				f.put(deleted(a, true))
				wait(time.Minute)
				s := f.get("a")
				if s.StorageSettled || s.Reason != ReasonTaken {
					f.Errorf("%+v", s)
				}
				s.Purge = false
				f.put(s)
				wait(time.Millisecond)
				if s := f.get("a"); !s.StorageSettled {
					f.Errorf("taken back: %+v", s)
				}
				if h, err := f.head(a); err != nil || h != before {
					f.Errorf("head: %+v, %v; before %+v", h, err, before)
				}
			})
		})
	}
}

// A purge fences the session's nodes before it deletes anything; taken back in the
// middle it leaves a session that is marked as deleted.
func TestPurgeFencesFirst(t *testing.T) {
	a := session("a", "main", "root")
	running(t, oneProfile, func(f *fixture) {
		f.save(a, map[string]string{"x": "1"})
		f.take(a, "n1")
	}, func(f *fixture) {
		if _, err := f.buckets.get("main").Put(f.Context(), "root/a/workspace/f", []byte("x"), objstore.PutOptions{}); err != nil {
			f.Fatal(err)
		}
		f.buckets.refuse(func(op string) error {
			if op == objstore.OpDelete {
				return fmt.Errorf("%w: not these keys", objstore.ErrDenied)
			}
			return nil
		})
		f.put(deleted(a, true))
		wait(time.Minute)
		if h, err := f.head(a); err != nil || h.Owner != last(a) || h.Released || h.Manifest == "" {
			f.Errorf("while it cannot be deleted: %+v, %v", h, err)
		}
		_, err := f.resolveIn(f.Context(), profile("main", "root"), a.Spec.Storage)
		wantErr(f.T, "create in the middle of a purge", err, codes.FailedPrecondition, ReasonPrefixInUse)
		s := f.get("a")
		s.Purge = false
		f.put(s)
		wait(time.Millisecond)
		if s := f.get("a"); !s.StorageSettled {
			f.Errorf("taken back: %+v", s)
		}
		if h, err := f.head(a); err != nil || h.Owner != last(a) || !h.Released || h.DeleteTime.IsZero() || h.Manifest == "" {
			f.Errorf("taken back: %+v, %v", h, err)
		}
	})
}

// A session whose node is given up is marked so that this node is fenced.
func TestDeletedFencesItsNode(t *testing.T) {
	a := session("a", "main", "root")
	running(t, oneProfile, func(f *fixture) {
		f.save(a, map[string]string{"x": "1"})
		f.take(a, "n1")
	}, func(f *fixture) {
		f.put(deleted(a, false))
		wait(time.Second)
		if s := f.get("a"); !s.StorageSettled {
			f.Errorf("%+v", s)
		}
		if h, err := f.head(a); err != nil || h.Owner != last(a) || !h.Released || h.DeleteTime.IsZero() || h.Manifest == "" {
			f.Errorf("%+v, %v", h, err)
		}
	})
}

// What this server does not know of may be others': a purge that would delete it is
// refused, and has deleted nothing.
func TestPurgeOfOthersFiles(t *testing.T) {
	within := func(prefix, profile, root string, mode fleet.StorageMode) *fleet.Session {
		o := session("other", "main", root)
		o.Spec.Storage.Prefix, o.Spec.Storage.Profile, o.Spec.Storage.Mode = prefix, profile, mode
		return o
	}
	for name, c := range map[string]struct {
		prefix string
		other  *fleet.Session
		says   string // empty: it is done
	}{
		"another root below the whole":  {"", within("o", "team", "team", fleet.ModeSnapshot), "s3://main/team"},
		"another root below the folder": {"team", within("o", "deep", "team/deep", fleet.ModeSnapshot), "s3://main/team/deep"},
		"a mount below the whole":       {"", within("o", "default", "", fleet.ModeMount), `session "other" has files in s3://main/o`},
		"a mount below the folder":      {"a/b", within("a/b/c/d", "default", "", fleet.ModeMount), "s3://main/a/b/c/d"},
		"a mount of the whole":          {"a/b", within("", "default", "", fleet.ModeMount), `session "other" has files in s3://main.`},
		"a mount around the folder":     {"a/b/c", within("a/b", "default", "", fleet.ModeMount), "s3://main/a/b"},
		"a mount beside the folder":     {"a/b", within("a/bc", "default", "", fleet.ModeMount), ""},
		"no files":                      {"a/b", within("a/b/c", "default", "", fleet.ModeSnapshot), ""},
	} {
		t.Run(name, func(t *testing.T) {
			profiles := map[string]conf.Config{"default": profile("main", ""), "team": profile("main", "team"), "deep": profile("main", "team/deep")}
			a := session("a", "main", "")
			a.Spec.Storage.Prefix = c.prefix
			f := newFixture(t, t.TempDir(), profiles)
			f.save(a, map[string]string{"x": "1"})
			f.save(c.other, map[string]string{"x": "2"})
			for _, s := range []*fleet.Session{a, c.other} {
				if _, err := f.buckets.get("main").Put(t.Context(), strings.TrimPrefix(s.Spec.Storage.URI()+"/workspace/f", "s3://main/"), []byte("x"), objstore.PutOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			before := len(f.objects("main", ""))
			f.put(deleted(a, true))
			_, err := f.settle(t.Context(), "a", a.UID, 1)
			s := f.get("a")
			if c.says == "" {
				if err != nil || !s.StorageSettled {
					t.Errorf("%v, %+v", err, s)
				}
			} else if n := len(f.objects("main", "")); s.StorageSettled || s.Reason != ReasonPrefixInUse || !strings.Contains(s.Message, c.says) || n != before {
				t.Errorf("settled %v, %s %q; %d of %d objects are left", s.StorageSettled, s.Reason, s.Message, n, before)
			}
			if h, err := f.head(c.other); err != nil || h.Manifest == "" {
				t.Errorf("the other session: %+v, %v", h, err)
			}
		})
	}
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
