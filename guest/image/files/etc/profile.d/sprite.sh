# Debian's /etc/profile sets PATH anew for a login shell: the tools of the sprite itself (`sprite-env`) are found all the same.
case :$PATH: in
  *:/.sprite/bin:*) ;;
  *) PATH=$PATH:/.sprite/bin ;;
esac
