package checkpoint

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

func TestRoundTrip(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.put("a/b/c.txt", "hello")
	r.put("empty", "")
	r.put("big", strings.Repeat("some text that compresses\n", 50_000))
	must(t, os.Symlink("../nowhere/"+strings.Repeat("x", 900), r.path("a/link")))
	must(t, os.Link(r.path("big"), r.path("a/again")))
	must(t, os.Chmod(r.path("empty"), 0o4751))
	must(t, os.Chown(r.path("a"), 7, 8))
	must(t, os.Chmod(r.path("a"), os.ModeSticky|0o777))
	must(t, unix.Mkfifo(r.path("fifo"), 0o640))
	must(t, os.Chtimes(r.path("a/b"), time.Unix(1, 2), time.Unix(3, 4)))
	info := r.save()
	if info.Files != 9 || info.Unchanged {
		t.Errorf("%+v", info)
	}
	r.check()
	if again := r.save(); !again.Unchanged || again.ID != info.ID {
		t.Errorf("unchanged tree gave %+v", again)
	}
	r.put("a/b/c.txt", "changed")
	second := r.save()
	if second.Unchanged || second.Parent != info.ID {
		t.Errorf("%+v", second)
	}
	r.check()
	for _, cache := range []bool{true, false} {
		r.reopen(cache)
		if again := r.save(); again.ID != second.ID {
			t.Errorf("after a restart with cache %v: %+v", cache, again)
		}
	}
	list, err := r.s.List(t.Context())
	must(t, err)
	if len(list) != 2 || list[0].ID != second.ID {
		t.Errorf("%+v", list)
	}
	must(t, r.s.Check(t.Context(), ""))
}
