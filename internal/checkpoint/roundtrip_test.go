package checkpoint

import (
	"bytes"
	"net"
	"os"
	"strings"
	"sync"
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

// What cannot be saved is said, what is not to be is not, and a mount is not entered.
func TestWhatIsLeftOut(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	r.o.Exclude = func(rel string, isDir bool) bool {
		return rel == "log" && isDir || strings.HasSuffix(rel, ".db-shm")
	}
	r.reopen(true)
	r.put("log/x", "1")
	r.put("a.db-shm", "1")
	r.put("a.db", "1")
	r.put("b/log", "1")
	l, err := net.Listen("unix", r.path("socket"))
	must(t, err)
	defer l.Close()
	must(t, unix.Mknod(r.path("device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(t, os.Mkdir(r.path("mount"), 0o700))
	must(t, unix.Mount("none", r.path("mount"), "tmpfs", 0, "size=64k"))
	unmount := sync.OnceValue(func() error { return unix.Unmount(r.path("mount"), unix.MNT_DETACH) })
	defer unmount()
	r.put("mount/not-mine", "1")
	r.put("bound", "")
	must(t, unix.Mount(r.path("a.db"), r.path("bound"), "", unix.MS_BIND, ""))
	unbind := sync.OnceValue(func() error { return unix.Unmount(r.path("bound"), unix.MNT_DETACH) })
	defer unbind()
	info := r.save()
	want := `"bound" is not saved: it is another file system
"device" is not saved: it is a device
"mount" is not saved: it is another file system
"socket" is not saved: it is a socket`
	if got := strings.Join(info.Notes, "\n"); got != want {
		t.Errorf("notes:\n%s\nwant:\n%s", got, want)
	}
	names := func() string {
		var all []string
		for l := range strings.SplitSeq(r.restored(""), "\n") {
			all = append(all, strings.Trim(strings.Split(l, " ")[0], `"`))
		}
		return strings.Join(all, " ")
	}
	if got := names(); got != ". a.db b b/log" {
		t.Errorf("restored: %s", got)
	}
	must(t, unmount())
	must(t, unbind())
	r.save()
	if got := names(); got != ". a.db b b/log bound mount" {
		t.Errorf("restored: %s", got)
	}
}

// Symbolic links that take the place of folders while they are walked lead nowhere.
func TestSwappedFolders(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	outside := t.TempDir()
	must(t, os.WriteFile(outside+"/secret", []byte("secret"), 0o600))
	r.put("d/secret", "own")
	stop := make(chan struct{})
	var g sync.WaitGroup
	g.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			os.Rename(r.path("d"), r.path("aside"))
			os.Symlink(outside, r.path("d"))
			os.Remove(r.path("d"))
			os.Rename(r.path("aside"), r.path("d"))
		}
	})
	for range 200 {
		if _, err := r.w.Save(t.Context(), nil, Meta{}); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	g.Wait()
	list, err := r.s.List(t.Context())
	must(t, err)
	for _, c := range list[:min(len(list), 40)] {
		var b bytes.Buffer
		must(t, r.s.WriteTar(t.Context(), c.ID, "", &b))
		text := b.Bytes()
		for len(text) > 0 {
			i := bytes.Index(text, []byte("secret\x00"))
			if i < 0 {
				break
			}
			if i%512 == 0 { // the beginning of a file's content
				t.Fatal("it followed a symbolic link")
			}
			text = text[(i/512+1)*512:]
		}
	}
}

// A change of what is not content (its session's record, its trigger) makes a new
// checkpoint without sending anything of the tree.
func TestMetaOnly(t *testing.T) {
	m := objstore.NewMemory()
	r := newRig(t, m, nil)
	r.put("a", "b")
	r.save()
	for i, meta := range []Meta{{Trigger: TriggerManual}, {Trigger: TriggerManual, SessionJSON: []byte("{}")}} {
		m.ResetStats()
		info, err := r.w.Save(t.Context(), noFreeze, meta)
		must(t, err)
		if info.Unchanged || info.Trigger != TriggerManual || m.Stats().Total() != 2 {
			t.Errorf("%d: %+v in %v", i, info, m.Stats().Requests)
		}
	}
	if info := r.save(); !info.Unchanged {
		// its own record is none: that is a change too
		if again := r.save(); !again.Unchanged {
			t.Errorf("%+v", again)
		}
	}
	// What has just been written may change again within the same stamp: until that
	// is past, it counts as changed.
	for end := time.Now().Add(10 * time.Second); ; {
		changed, err := r.w.Changed(t.Context())
		must(t, err)
		if !changed {
			break
		}
		if time.Now().After(end) {
			t.Fatal("changed for ever")
		}
		r.save()
	}
	r.put("a", "c")
	if changed, err := r.w.Changed(t.Context()); err != nil || !changed {
		t.Errorf("%v %v", changed, err)
	}
}
