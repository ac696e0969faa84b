package mountinfo

import (
	"slices"
	"testing"
)

func TestParse(t *testing.T) {
	got := parse(`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
42 27 0:39 / /a\040b\011c\134d rw,nosuid,nodev shared:7 master:2 - fuse.tigrisfs bkt rw,user_id=7
43 27 0:40 / /ro ro - fuse.rclone CC{x}:b ro
nonsense
44 27 0:41 / /short rw - tmpfs
`)
	want := []Mount{
		{ID: 36, Parent: 35, Dev: "98:0", Root: "/mnt1", Point: "/mnt2", FSType: "ext3", Source: "/dev/root"},
		{ID: 42, Parent: 27, Dev: "0:39", Root: "/", Point: "/a b\tc\\d", Shared: true, FSType: "fuse.tigrisfs", Source: "bkt"},
		{ID: 43, Parent: 27, Dev: "0:40", Root: "/", Point: "/ro", ReadOnly: true, FSType: "fuse.rclone", Source: "CC{x}:b"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestOwn(t *testing.T) {
	at, err := At("/proc/")
	if err != nil || len(at) == 0 || at[0].FSType != "proc" {
		t.Errorf("At(/proc) = %+v, %v", at, err)
	}
}
