package tigrisfs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/fsop"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount/process"
)

const (
	syncPause    = 250 * time.Millisecond
	stuckAfter   = 5 * time.Second // with an object store that answers
	maxDumpBytes = 64 << 20
	maxFolders   = 10000
	maxLogBytes  = 2 * maxDumpBytes
)

// inode is what the attribute `debug` prints, the parts we need.
type inode struct {
	Fn         string `json:"fn"`
	ID         uint64 `json:"id"`
	Path       string `json:"path"`
	State      string `json:"state"` // created, modified, deleted; "" if all is uploaded
	FlushError string `json:"flushError"`
	Dir        *struct {
		ModifiedChildren int      `json:"modifiedChildren"` // in all below; open files count too
		DeletedChildren  []string `json:"deletedChildren"`
	} `json:"dir"`
}

// Sync implements process.Driver: fsync of the root, then a look at what is not
// uploaded, until that is nothing.
func (d driver) Sync(ctx context.Context, m process.Mounted) error {
	var before, left map[string]string // path: why
	var stuck time.Time                // since when all that is left are removals
	for {
		err := m.Ask(ctx, func(ctx context.Context) error { return fsop.Fsync(ctx, m.Point) })
		if err == nil {
			// Not lost if it fails: what was left before is what can be said.
			var now map[string]string
			if now, err = d.pending(ctx, m); err == nil {
				before, left = left, now
			}
		}
		switch {
		case err != nil && ctx.Err() == nil:
			return fmt.Errorf("%w: %w", mount.ErrNotFlushed, err)
		case err != nil && left == nil:
			return fmt.Errorf("%w: flushing has not ended in time: %w", mount.ErrNotFlushed, ctx.Err())
		case err == nil && settled(before, left):
			return nil
		case err == nil && !onlyRemovals(left):
			stuck = time.Time{}
		case err == nil && stuck.IsZero():
			stuck = time.Now()
		case err == nil && time.Since(stuck) > stuckAfter && answers(ctx, m.Endpoint):
			// TigrisFS keeps names for ever: of what never became an object, because it
			// was renamed before its upload, as git does with its locks; and now and then
			// of what is one.
			return &mount.RemovalsLeftError{Names: slices.Sorted(maps.Keys(left))}
		}
		t := time.NewTimer(syncPause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: %s: %w", mount.ErrNotFlushed, describe(left), ctx.Err())
		}
	}
}

// Why something is pending, other than an upload that failed.
const (
	// changing has changes and no error: after an fsync those are new ones.
	changing = "has changed again"
	removing = "is not removed yet"
)

// settled says whether all that was done before the last fsync has reached the
// object store. What is written all the time is never without a change; a removal
// counts once it was pending twice.
func settled(before, left map[string]string) bool {
	for name, why := range left {
		switch why {
		case changing:
		case removing:
			if before == nil || before[name] == removing {
				return false
			}
		default:
			return false
		}
	}
	return true
}

func onlyRemovals(left map[string]string) bool {
	for _, why := range left {
		if why != removing {
			return false
		}
	}
	return len(left) > 0
}

// answers says whether the object store can be reached, whatever it says.
func answers(ctx context.Context, endpoint string) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, endpoint, nil)
	if err != nil {
		return false
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}}
	resp, err := client.Do(req)
	if err != nil {
		return false
	}
	return resp.Body.Close() == nil && resp.StatusCode < http.StatusInternalServerError
}

func describe(left map[string]string) string {
	names := slices.Sorted(maps.Keys(left))
	var b strings.Builder
	for i, name := range names {
		if i == 3 {
			fmt.Fprintf(&b, "; and %d more", len(names)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%q: %s", name, left[name])
	}
	return b.String()
}

// pending returns what is not uploaded, and why not.
func (d driver) pending(ctx context.Context, m process.Mounted) (map[string]string, error) {
	left := map[string]string{}
	folders := []string{"."}
	for seen := 0; len(folders) > 0; {
		seen += len(folders)
		if seen > maxFolders {
			return nil, fmt.Errorf("more than %d folders have changes", maxFolders)
		}
		inodes, err := d.dump(ctx, m, folders)
		if err != nil {
			return nil, err
		}
		asked := map[string]bool{}
		for _, f := range folders {
			asked[strings.TrimPrefix(f, ".")] = true
		}
		folders = nil
		for _, in := range inodes {
			switch {
			case in.FlushError != "" && in.State != "":
				left[in.Path] = strings.Join(strings.Fields(in.FlushError), " ") // some have lines
			case in.State != "":
				left[in.Path] = changing
			}
			if in.Dir == nil {
				continue
			}
			if asked[in.Path] {
				for _, name := range in.Dir.DeletedChildren {
					left[path.Join(in.Path, name)] = removing
				}
			} else if in.Dir.ModifiedChildren > 0 {
				folders = append(folders, in.Path)
			}
		}
	}
	return left, nil
}

// dump returns the state of folders and of what is in them.
func (d driver) dump(ctx context.Context, m process.Mounted, folders []string) ([]inode, error) {
	from := int64(0)
	if fi, err := os.Stat(m.Log); err == nil {
		from = fi.Size()
	}
	err := m.Ask(ctx, func(ctx context.Context) error { return fsop.Setxattr(ctx, m.Point, "debug", folders...) })
	if err != nil {
		return nil, err
	}
	data, err := process.Since(m.Log, from, maxDumpBytes)
	if err != nil {
		return nil, err
	}
	var inodes []inode
	for line := range bytes.Lines(data) {
		var l logLine
		if json.Unmarshal(line, &l) != nil || !strings.HasPrefix(l.Message, "{") {
			continue
		}
		var in inode
		if json.Unmarshal([]byte(l.Message), &in) == nil && in.Fn == "set_xattr" {
			inodes = append(inodes, in)
		}
	}
	if len(inodes) == 0 && folders[0] == "." {
		return nil, errors.New("this version of TigrisFS does not tell what it has not uploaded")
	}
	return inodes, nil
}

type logLine struct {
	Level   string `json:"level"`
	Message string `json:"message"`
	Error   string `json:"error"`
}

// Words implements process.Driver.
func (driver) Words(line string) string {
	var l logLine
	if json.Unmarshal([]byte(line), &l) != nil {
		return line // usage, or a panic
	}
	switch l.Level {
	case "warn", "error", "fatal", "panic":
	default:
		return ""
	}
	if l.Error != "" {
		return l.Message + ": " + l.Error
	}
	return l.Message
}
