package containerd

import "testing"

func TestOlderThan(t *testing.T) {
	for _, c := range []struct {
		have, want string
		older      bool
	}{
		{"v2.4.2", "2.3.5", false},
		{"2.3.4", "2.3.5", true},
		{"1.6.20~ds1", "2.3.5", true},
		{"1.1.5+ds1", "1.2.8", true},
		{"v2.3.5-rc.1", "2.3.5", false},
		{"1.10.0", "1.9.9", false},
		{"unknown", "2.3.5", false},
	} {
		if got := olderThan(c.have, c.want); got != c.older {
			t.Errorf("olderThan(%q, %q) = %v", c.have, c.want, got)
		}
	}
}

func TestWithoutLoopback(t *testing.T) {
	for conf, want := range map[string]string{
		"nameserver 10.0.0.1\nsearch lan\n":            "nameserver 10.0.0.1\nsearch lan\n",
		"nameserver 127.0.0.53\noptions edns0\n":       "",
		"nameserver 127.0.0.1\nnameserver 9.9.9.9\n":   "nameserver 9.9.9.9\n",
		"nameserver ::1\n":                             "",
		"# nameserver 1.1.1.1\nnameserver\tfd00::53\n": "# nameserver 1.1.1.1\nnameserver\tfd00::53\n",
	} {
		got, ok := withoutLoopback(conf)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%q: %q %v", conf, got, ok)
		}
	}
}
